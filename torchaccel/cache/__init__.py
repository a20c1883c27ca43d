"""What is kept on disk between processes; `store` has the folder and its entries."""
