"""What is measured, and how it is shown: figures and tables described once, written as HTML, PNG, CSV and Markdown."""
