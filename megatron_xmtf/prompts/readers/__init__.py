"""One file format each: bytes -> lines -> rows, each with where it stands for error messages.

read_lines(path)         ->  (1, b'{"a": 1}\\n'), (2, ...)
read_jsonl(path, lines)  ->  ("rows.jsonl:1", {"a": 1}), ...
"""
