"""The objective: one module an equation (11-18); `total` is Eq. 19, their weighted sum."""
