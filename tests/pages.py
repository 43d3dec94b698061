"""Pages as a browser would build them, and what metadata may try on them."""

from html.parser import HTMLParser

HOSTILE = [
    "<script>alert(1)</script>",
    '"></audio><img src=x onerror=alert(1)>',
    "' onmouseover='alert(1)",
    "</script><script>alert(1)</script>",
    "</style></title></textarea></noscript><svg/onload=alert(1)>",
    "--><!-- <![CDATA[ ]]>",
    "javascript:alert(1)",
    "data:text/html,<script>alert(1)</script>",
    "https://evil.example/track.gif",
    "a\x00b\x08\x1b[31m",
    "a\u2028b\u2029c",
    "safe\u202egpj.exe",
    "\ud800 lone surrogate",
    "&lt;b&gt; &amp;",
    "{0} {title} %s ${x} {{",
    "<h1>" * 20_000,
]


class Page(HTMLParser):
    """What a browser would build: elements with attributes, text outside scripts, and scripts."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html, self.elements, self.text, self.scripts, self._raw = html, [], "", [], ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._raw = tag if tag in ("script", "style") else ""
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag):
        self._raw = ""

    def handle_data(self, data):
        if self._raw == "script":
            attrs, text = self.scripts[-1]
            self.scripts[-1] = (attrs, text + data)
        elif not self._raw:
            self.text += data

    def all(self, tag, **attributes):
        return [a for t, a in self.elements if t == tag and attributes.items() <= a.items()]
