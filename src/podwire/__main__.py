"""`python -m podwire` is `podwire`."""

from podwire.cli.main import main

main()
