"""Kafka as a bus: what its source and its producer are made of.

========== ==============================================================================
file       content
========== ==============================================================================
client     librdkafka in one place: settings, errors, forked children
reader     a member of a consumer group: what it reads, what is gone, commits
partitions which partitions a consumer has, and what comes next in each
delivery   messages on their way to the brokers, and what was refused
========== ==============================================================================
"""
