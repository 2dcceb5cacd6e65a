#!/bin/sh
# One boot of a VM of image 1.4.0, written from the description of that image alone: curl, jq, openssl and cryptsetup.
#
# Set by the caller: URL, CA, VM, HOTKEY; ROOT, STORAGE and CACHE, image files; HELPER, a program that signs
# ("sign MESSAGE" prints hex) and quotes ("quote STAGE HEX" prints base64). LOSE names calls whose answers are lost on
# their way ("confirm-root confirm"), OFF a place where the power goes. The exit code says how the boot ended:
# 0 the system is up, 10 powered off.
# shellcheck disable=SC2015,SC2153
set -u
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

say() { echo "vm: $*" >&2; }
power_off() { say "power off: $*"; exit 10; }
off_at() { case " ${OFF:-} " in *" $1 "*) power_off "killed at $1" ;; esac; }
lost() { case " ${LOSE:-} " in *" $1 "*) return 0 ;; *) return 1 ;; esac; }

openssl req -x509 -newkey "rsa:${RSA_BITS:-4096}" -nodes -days 365 -subj "/O=chutes/OU=sek8s/CN=sek8s-vm-root-ca" \
    -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null || power_off "no certificate"
spki=$(openssl x509 -in "$work/cert.pem" -pubkey -noout | openssl pkey -pubin -outform der | sha256sum | cut -d' ' -f1)

# call NAME METHOD PATH [curl options]: the body goes to $work/NAME, the status to $status ("000": no answer).
call() {
    name=$1 method=$2 path=$3
    shift 3
    status=$(curl -sS --max-time 30 --cacert "$CA" --cert "$work/cert.pem" --key "$work/key.pem" -X "$method" \
        -o "$work/$name" -w '%{http_code}' "$@" "$URL$path" 2>"$work/curl") || status=000
    if lost "$name"; then status=000; fi
    if [ "$status" != 200 ]; then
        say "$name: $status $(jq -r '.detail // .message // .error' "$work/$name" 2>/dev/null | head -1 | cut -c1-300)"
        return 1
    fi
}

# signed NAME PATH NONCE BODY [curl options]: a POST with the proof of the hotkey, over the nonce of this call.
signed() {
    name=$1 path=$2 nonce=$3
    printf %s "$4" >"$work/body"
    shift 4
    digest=$(sha256sum <"$work/body" | cut -d' ' -f1)
    call "$name" POST "$path" -H 'Content-Type: application/json' --data-binary "@$work/body" \
        -H "X-Chutes-Hotkey: $HOTKEY" -H "X-Chutes-Nonce: $nonce" \
        -H "X-Chutes-Signature: $("$HELPER" sign "$HOTKEY:$nonce:$digest")" "$@"
}

member() { jq -er ".$2 // empty" "$work/$1"; }
slots() { cryptsetup luksDump --dump-json-metadata "$1" | jq -r '.keyslots | keys[]'; }
opens() { printf %s "$2" | cryptsetup open --test-passphrase --key-file=- "$1"; }
fast="--pbkdf pbkdf2 --pbkdf-force-iterations 1000" # a test's, not the image's
add_key() {
    printf %s "$2" >"$work/old"
    printf %s "$3" >"$work/new"
    # shellcheck disable=SC2086
    cryptsetup luksAddKey $fast --key-file "$work/old" "$1" "$work/new"
}
kill_slots() {
    disk=$1
    shift
    for slot in "$@"; do cryptsetup luksKillSlot -q "$disk" "$slot" || power_off "slot $slot of $disk stays"; done
}
take_off() { printf %s "$2" | cryptsetup luksRemoveKey -q "$1" --key-file=- || power_off "a key of $1 stays"; }

# --- boot: nonce and attestation, three attempts ---

first_boot=false
if cryptsetup token export --token-id 15 "$ROOT" >/dev/null 2>&1; then first_boot=true; fi
attempt=1 granted=
while [ "$attempt" -le 3 ]; do
    if call nonce GET "/servers/nonce?miner_hotkey=$HOTKEY"; then
        nonce=$(member nonce nonce)
        body=$(jq -cn --arg quote "$("$HELPER" quote boot "$nonce$spki")" --arg vm "$VM" --arg hotkey "$HOTKEY" \
            --argjson first "$first_boot" '{quote: $quote, vm_name: $vm, miner_hotkey: $hotkey, first_boot: $first}')
        if signed "boot$attempt" /servers/boot/attestation "$nonce" "$body" \
            && key=$(member "boot$attempt" key) && quote_nonce=$(member "boot$attempt" luks_quote_nonce) \
            && caller=$(member "boot$attempt" vm_auth_ss58); then
            granted=yes
            break
        fi
        case $status in
            401 | 403 | 404) break ;;
            429) sleep $((2 * attempt)) ;;
        esac
    fi
    attempt=$((attempt + 1))
    [ "$attempt" -le 3 ] && sleep "${PAUSE:-2}"
done
[ "$granted" ] || power_off "boot refused"
case $caller in 5*) ;; *) power_off "vm_auth_ss58 is no address" ;; esac
root_next=$(member "boot$attempt" root_next) && root_confirm=$(member "boot$attempt" root_confirm_nonce) \
    || power_off "no root_next"
echo "$caller" >"$ROOT.caller"
off_at granted

# --- the root disk ---

opens "$ROOT" "$key" || power_off "the root disk does not open"
if [ "$first_boot" = true ]; then cryptsetup token remove --token-id 15 "$ROOT" || power_off "the token stays"; fi
before=$(slots "$ROOT")
add_key "$ROOT" "$key" "$root_next" || power_off "root_next was not added"
off_at root-added
if signed confirm-root "/servers/$VM/provision/confirm" "$root_confirm" '{"volumes":{"root":{"rotated":true}}}' \
    -H "X-Confirm-Nonce: $root_confirm"; then
    off_at root-confirmed
    # shellcheck disable=SC2086
    kill_slots "$ROOT" $before
else
    take_off "$ROOT" "$root_next"
fi

# --- provision ---

body=$(jq -cn --arg quote "$("$HELPER" quote runtime "$quote_nonce$spki")" \
    '{quote: $quote, volumes: ["storage", "tdx-cache"]}')
signed provision "/servers/$VM/provision" "$quote_nonce" "$body" -H "X-Quote-Nonce: $quote_nonce" \
    || power_off "provision: $status"
k3s=$(member provision k3s_encryption_key) || power_off "no k3s_encryption_key"
[ "$(printf %s "$k3s" | base64 -d | wc -c)" = 32 ] || power_off "a k3s key of another size"
off_at provisioned

# volume NAME DISK: opens or formats it; leaves $rotated, and the old slots in $work/NAME.slots.
volume() {
    current=$(jq -er ".volumes.\"$1\".current // empty" "$work/provision")
    next=$(jq -er ".volumes.\"$1\".next" "$work/provision") || power_off "no key of $1"
    : >"$work/$1.slots"
    if ! cryptsetup isLuks "$2"; then
        # shellcheck disable=SC2086
        printf %s "${current:-$next}" | cryptsetup luksFormat -q --type luks2 $fast --key-file=- "$2" \
            || power_off "format of $1"
        [ -z "$current" ] && rotated=true && return
    fi
    opens "$2" "$current" || power_off "$1 does not open"
    old=$(slots "$2")
    rotated=false
    if add_key "$2" "$current" "$next"; then
        rotated=true
        echo "$old" >"$work/$1.slots"
    fi
}
volume storage "$STORAGE"
storage=$rotated
off_at storage
volume tdx-cache "$CACHE"
cache=$rotated
off_at added
if confirm=$(member provision confirm_nonce); then
    body=$(printf '{"volumes":{"storage":{"rotated":%s},"tdx-cache":{"rotated":%s}}}' "$storage" "$cache")
    if signed confirm "/servers/$VM/provision/confirm" "$confirm" "$body" -H "X-Confirm-Nonce: $confirm"; then
        off_at confirmed
        # shellcheck disable=SC2046
        kill_slots "$STORAGE" $(cat "$work/storage.slots")
        # shellcheck disable=SC2046
        kill_slots "$CACHE" $(cat "$work/tdx-cache.slots")
    else
        for name in storage tdx-cache; do
            disk=$STORAGE
            [ "$name" = storage ] || disk=$CACHE
            [ -s "$work/$name.slots" ] && take_off "$disk" "$(jq -r ".volumes.\"$name\".next" "$work/provision")"
        done
    fi
fi
say "up"
exit 0
