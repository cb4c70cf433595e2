"""The ground: small tools that know nothing of the rest."""
