"""The JavaScript client and the page, in a real browser."""
