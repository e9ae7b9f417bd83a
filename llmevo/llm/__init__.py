"""Chat clients: one request in, one reply out, behind one Protocol."""
