"""Side-by-side measurements of qingyu and what one would use instead (extra ``bench``)."""
