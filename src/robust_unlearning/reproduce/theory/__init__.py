"""The paper's theorems and assumptions: closed forms, and measurements on models."""
