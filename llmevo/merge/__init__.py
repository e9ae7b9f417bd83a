"""The merge stage: parents in, one resident merged model out."""
