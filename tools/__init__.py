"""Commands that build, train and measure; not part of the installed package."""
