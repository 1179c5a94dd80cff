"""The folder of a campaign and the engine that moves it."""
