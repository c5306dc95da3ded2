"""The commands of `headstart`, one file each; some of them are functions of the package too."""
