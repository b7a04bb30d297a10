"""The report of one or several runs: a single HTML file that opens from disk and asks no network for anything.

`record` reads run folders, `evaluations` what was measured in them; `figures` draws; `words` says; `tail` packs the
responses for the browser of the tail; `page` puts it together.
"""
