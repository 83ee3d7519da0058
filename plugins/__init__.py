"""The backbone plugins that come with sinder; found through entry points like anyone's."""
