"""Before and while the data stages run over more rows than one looks at: `raphael plan`, `raphael data status`."""
