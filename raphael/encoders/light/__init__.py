"""The networks in our own folders without the libraries that trained them: diffusers and open_clip take seconds to
import, and one image less than one. The same weights by the same names, the same bits."""
