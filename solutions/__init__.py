"""The masters of the course (`src/`), and what makes notebooks of them (`build.py`)."""
