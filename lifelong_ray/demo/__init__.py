"""The main job, ``lifelong demo``: the whole loop on real images in a few minutes.

`world` makes the images and changes them, `traffic` is the client process, `story`
tells the system what to do and measures it, `report` draws what was measured.
"""
