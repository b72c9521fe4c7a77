"""Does a policy that was trained on what comes next do what a video shows?"""
