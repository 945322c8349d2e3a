"""The pages of the repository, written from result files, docstrings and parsers: no figure in them is typed.

    python -m scripts.pages              # write README.md's and docs/'s generated parts
    python -m scripts.pages --check      # only name the pages that are stale (exit status 1 if any is)
    python -m scripts.pages --pictures   # draw docs/*.png too; needs Chromium, as the browser tests do

A page is a Markdown file. What stands in it between `<!-- made: NAME -->` and `<!-- end: NAME -->` is the
block of that name in `blocks.py`; the rest is written by hand. `docs/models.md` shows what
`python -m scripts.model_types` found.
"""
