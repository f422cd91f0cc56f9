"""The report of one or more sweeps: a page of HTML that holds everything it needs, or Markdown.

Reading order: `figures` (what can be drawn, by name), `curves`, `fields` and `machines` (the figures), `style` (their
colors and text), `trials_table` and `sections` (what the page says, as plain values), and `report` (HTML through
`page.html.jinja`, Markdown, or tables).
"""
