"""qat: ship a chat persona at four bits and prove that it still behaves."""

__version__ = "0.1.0"
