"""Commands of `megasora` that combine several packages."""
