"""Pictures of what the networks do: flow colours, match lines, panels, contact sheets and the HTML report.

Everything here draws with Pillow and numpy and returns pictures, which the caller saves
(`cocosnet.data.images.save_image`); only the report writes its own page.
"""
