"""Ways of sharing one run's work between processes, behind one seam (`base.Engine`)."""
