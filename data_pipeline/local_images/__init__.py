"""Images that lie here already, each with its caption: what `source` lists, `download` packs and `data check` reads."""
