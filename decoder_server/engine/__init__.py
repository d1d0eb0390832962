"""One request of a served model: check, plan, admit, fetch, score, rank."""
