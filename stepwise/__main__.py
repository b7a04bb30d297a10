"""`python -m stepwise`, and `torchrun --nproc-per-node 2 -m stepwise run mine.yaml`."""

from stepwise.cli import main

if __name__ == "__main__":
    main()
