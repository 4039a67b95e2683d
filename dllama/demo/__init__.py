"""What the demonstrations show: data made up for this project."""
