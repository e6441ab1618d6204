"""The text that is measured on where nobody names one."""


def default_text() -> str:
    """The topics of the standard library's ``pydoc_data.topics``, sorted by name, joined by newlines: English and code."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))
