"""Attacks by clients that have a key, or none, and what the servers do: each file is one attack or one kind of them.

Keys        test_keyless, test_stolen_keys, test_scopes, test_left_traces: servers without keys, keys that were stolen,
            what a key does not show, and what the audit log keeps of refusals and downloads
Requests    test_prompts, test_logprobs, test_constraints, test_templates: requests that cost much in a place that
            nobody thinks of, beside others' streams
Fairness    test_priority, test_accounting, test_unmetered: more than one's share, by urgency, by what is not counted,
            and by questions that cost nothing
Connections test_slow_clients, test_bodies: clients that send or read slowly, and bodies that would fill the memory
Machine     test_disk, test_memory, test_places: the disk, the memory and the threads of the catalog's API
Adapters    test_manifests, test_claims, test_stored: manifests written by hand, measurements that nobody made, and
            names, versions and manifests in any number
Browsers    test_docs_pages: scripts of another host on the pages of reference
"""
