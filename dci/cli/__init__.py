"""The programs: each a module with a `main()`, and what they share."""
