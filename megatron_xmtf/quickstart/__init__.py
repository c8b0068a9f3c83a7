"""The embedded default: real multilingual data out of CLDR, a tiny model, the whole path."""
