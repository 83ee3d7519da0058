"""The backbone plugins that come with sinder, found through entry points like any other plugin."""
