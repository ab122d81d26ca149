"""How long things take: each module measures one part of the library beside baselines."""
