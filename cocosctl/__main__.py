"""`python -m cocosctl` is `cocosctl`."""

from cocosctl.app import main

if __name__ == "__main__":
    main()
