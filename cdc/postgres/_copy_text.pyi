from collections.abc import Collection

from cdc.change import Image

def plain_text(images: Collection[Image], width: int) -> tuple[bytes, Collection[Image]]: ...
