"""Reports: statistics over runs, comparisons, figures, HTML, Markdown and CSV."""
