#!/usr/bin/env bash
# Boots as a deployed image's initramfs does: curl, grep, openssl and nothing else. One space in an answer's JSON breaks it.
# Usage: initramfs.sh URL CA_FILE HOTKEY VM_NAME QUOTE_COMMAND…   (the quote command gets the report data in hex as last argument
# and writes the quote to standard output)
set -euo pipefail
url=$1 ca=$2 hotkey=$3 vm=$4
shift 4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

value() { grep -o "\"$1\":\"[^\"]*\"" "$2" | cut -d'"' -f4; }

openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj "/CN=tdx-vm-$(date +%s)" \
  -keyout "$work/client.key" -out "$work/client.crt" 2>/dev/null
cert_hash=$(openssl x509 -in "$work/client.crt" -pubkey -noout | openssl pkey -pubin -outform der | sha256sum | cut -d' ' -f1)

curl -sS --fail --cacert "$ca" "$url/servers/nonce" >"$work/nonce.json"
nonce=$(value nonce "$work/nonce.json")
[ ${#nonce} -eq 64 ]

"$@" "$nonce$cert_hash" >"$work/quote.bin"
printf '{"quote":"%s","vm_name":"%s","miner_hotkey":"%s"}' "$(base64 -w0 "$work/quote.bin")" "$vm" "$hotkey" >"$work/body.json"
status=$(curl -sS -o "$work/boot.json" -w '%{http_code}' --cacert "$ca" --cert "$work/client.crt" --key "$work/client.key" \
  -H "X-Chutes-Nonce: $nonce" -H 'Content-Type: application/json' --data-binary "@$work/body.json" "$url/servers/boot/attestation")
if [ "$status" != 200 ]; then
  cat "$work/boot.json" >&2
  exit 1
fi
[ "$(grep -o '"key":"[^"]*"' "$work/boot.json" | wc -l)" -eq 1 ]
[ "$(grep -o '"boot_token":"[^"]*"' "$work/boot.json" | wc -l)" -eq 1 ]
key=$(value key "$work/boot.json")
token=$(value boot_token "$work/boot.json")
[ ${#key} -gt 0 ] && [ ${#token} -eq 64 ]

# An older image asks for its one volume with GET, over plain TLS without a client certificate.
legacy() {
  curl -sS -o "$work/legacy.json" -w '%{http_code}' --cacert "$ca" -A 'TDX-LUKS-Storage/1.0' -H "X-Boot-Token: $token" \
    "$url/servers/$vm/luks?hotkey=$hotkey"
}
before=$(legacy)

# The image says rekey for devices that are not LUKS yet; here all are formatted already, or there would be nothing to compare.
status=$(curl -sS -o "$work/sync.json" -w '%{http_code}' --cacert "$ca" -H "X-Boot-Token: $token" \
  -H "X-Chutes-Hotkey: $hotkey" -H 'Content-Type: application/json' -d '{"volumes":["storage","tdx-cache"]}' "$url/servers/$vm/luks")
[ "$status" = 200 ]
for volume in storage tdx-cache; do
  [ "$(grep -o "\"$volume\":\"[^\"]*\"" "$work/sync.json" | wc -l)" -eq 1 ]
  printf '%s ' "$(value "$volume" "$work/sync.json" | sha256sum | cut -d' ' -f1)"
done
printf '%s ' "$(printf '%s\n' "$key" | sha256sum | cut -d' ' -f1)"
printf 'legacy-before:%s:' "$before"
if [ "$before" = 200 ]; then printf '%s ' "$(value passphrase "$work/legacy.json" | sha256sum | cut -d' ' -f1)"; else printf 'none '; fi
printf 'legacy-after:%s\n' "$(legacy)"
