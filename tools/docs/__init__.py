"""The documentation site: what generates parts of pages, draws pictures, checks the result and follows tutorials.

``make docs`` builds the site with mkdocs, which loads ``hook.py``.
"""
