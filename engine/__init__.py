import faulthandler

if not faulthandler.is_enabled():
    faulthandler.enable()  # before anything heavy is imported, which may crash; from dist.run on, with the rank
