"""What a prompt looks like: template files, what a template shows, and how it is posed.

load_templates(path)  ->  Template, Template ...  ->  PosedTemplate (plain, few-shot, with options, chain of thought)
"""
