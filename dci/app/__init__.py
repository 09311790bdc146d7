"""The page where people see what DCI does, and learn concepts of their own."""
