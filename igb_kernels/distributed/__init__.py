"""Balancing over several processes: each has its own part of the batch, and all get the weights of the whole.

Gradients of a task are averaged over the processes before anything is measured, since the Gramian of averages is not
the average of Gramians. Each process gets the averages of its own shard of the parameters alone (reduce-scatter); what
is measured of shards adds up, and the shards of the update are gathered at the end.
"""
