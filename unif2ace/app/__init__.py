"""`unif2ace demo-app`: a page on one's own machine to paint faces, ask about one, and paint a part of one anew."""
