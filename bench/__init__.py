"""What an aggregation costs: flctl beside other libraries and beside plain reading and writing. Linux only."""
