"""The recipe that makes or adapts an FBNL reranker checkpoint. Nothing at run time imports this package."""
