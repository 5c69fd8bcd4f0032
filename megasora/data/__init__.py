"""The data path: decodes clips, reads and writes shards, plans and loads packs. docs/shards.md, docs/data.md."""
