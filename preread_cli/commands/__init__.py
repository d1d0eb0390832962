"""One module for related commands; imported when one of them is called."""
