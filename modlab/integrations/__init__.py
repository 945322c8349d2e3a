"""Meeting points with other libraries, one file each; nothing here is imported before it is needed."""
