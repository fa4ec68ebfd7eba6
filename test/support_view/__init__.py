"""What tests of the page share: a scheduler to look at, recordings of it, and a browser."""
